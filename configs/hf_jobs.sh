#!/bin/bash
# On the hub's machines, in a clone of the kit: bash configs/hf_jobs.sh OWNER/NAME (a private repository for the model)
set -e
hf jobs run --flavor a100x4 --timeout 12h --secrets HF_TOKEN --volume .:/kit --env HUB_REPO="${1:?give OWNER/NAME}" \
  pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime \
  bash -c 'cp -r /kit /tmp/kit && cd /tmp/kit && pip install -r requirements.txt &&
    accelerate launch --config_file configs/ddp.yaml --num_processes 4 \
    -m lazyorpo_lib --dataset my_pairs.jsonl --method lora --output-dir /tmp/run --hub-repo $HUB_REPO'
