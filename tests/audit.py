"""python -m tests.audit: the pinned versions against the known vulnerabilities, as pip-audit asks for them.

Fails on one that is not in ACCEPTED. Where no service can be asked, one line says so, and nothing fails.
"""

import json
import subprocess
import sys

ACCEPTED: dict[str, str] = {}  # id of a vulnerability -> date, and why it does not matter here


def judge(report: dict) -> tuple[int, str]:
    """Exit status and one line a finding, from pip-audit's JSON."""
    asked = [package for package in report.get("dependencies", []) if "vulns" in package]
    if not asked:
        return 0, "pip-audit: no vulnerability service could be asked; nothing was checked."
    found = [(v["id"], f"{p['name']} {p['version']}") for p in asked for v in p["vulns"]]
    lines = [f"{name} has {number}: " + ACCEPTED.get(number, "not accepted") for number, name in found]
    checked = f"{len(asked)} of {len(report['dependencies'])} packages checked"
    lines.append(f"pip-audit: {checked}, {len(found)} known vulnerabilities.")
    return int(any(number not in ACCEPTED for number, _ in found)), "\n".join(lines)


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "-r",
        "constraints.txt",
        "--no-deps",
        "--disable-pip",
        "-f",
        "json",
    ]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--timeout", "10"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # it ends in a traceback where it reaches nobody
        report = {}
    status, text = judge(report)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
