"""docs/is_it_better.md from the JSON of the experiments: every table, every sentence with a figure of ours.

    python -m tests.benchmarks.page            # writes what is between the marks, and the picture
    python -m tests.benchmarks.page FOLDER …   # takes the JSON from these folders of experiments first

Between `<!-- name -->` and `<!-- /name -->` stands what BLOCKS gives for the name; a test holds that it does.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from lazyorpo_lib.folder import read_json
from lazyorpo_lib.results.card import table
from lazyorpo_lib.settings import Settings, settle

from . import lab, nocue, own_samples, truthful
from .lab import mean, needed, spread

HOME = Path(__file__).parents[2]
DOCS = HOME / "docs"
PAGES = (DOCS / "is_it_better.md", HOME / "README.md")
MODULES = {"truthful": truthful, "nocue": nocue, "own_samples": own_samples}
PICTURE = "displacement.png"


def kept(name: str) -> dict:
    return read_json(DOCS / f"{name}.json")


def absent(name: str) -> str:
    return f"Not measured yet: `python -m tests.benchmarks.{name} …` makes it."


def verdict(values: list, form: str = "+.3f") -> str:
    """Write a difference with its interval, and whether that leaves zero out."""
    low, high = lab.bounds(values)
    return f"{spread(values, form)}, {'beyond' if low > 0 or high < 0 else 'within'} the noise"


def made(name: str, also: str) -> str:
    one = kept(name)
    if not one:
        return ""
    return (
        f"{also} Made by `{one['command']}`, at commit {', '.join(one['commits'])}, {one['date']}, "
        f"on {one['machine']}, "
        f"torch {one['torch']}, float32, {one['process_minutes']:.0f} minutes of single-thread processes "
        f"beside other work; every figure is in [{name}.json]({name}.json)."
    )


def whole_folds(one: dict) -> str:
    done = {name: len(folds) for name, folds in one["records"].items()}
    if len(set(done.values())) == 1:
        return f"{min(done.values())} of {one['folds']} folds"
    return "folds done: " + ", ".join(f"{name} {count}" for name, count in done.items())


def about_truthful() -> str:
    if not (one := kept("truthful")):
        return absent("truthful")
    rates, search = ", ".join(f"{name} {rate:g}" for name, rate in one["rates"].items()), one["search"]
    ends = {name: [try_["rate"] for try_ in tries] for name, tries in search["tried"].items()}
    edge = [n for n, rate in one["rates"].items() if rate in (min(ends[n]), max(ends[n]))]
    rates += f"; at an end of what was tried: {', '.join(edge)}" if edge else ""
    return made(
        "truthful",
        f"{whole_folds(one)}, each its own seed; {one['pairs']} pairs to train on, once, "
        f"{one['pairs_per_step']} a step; {one['questions']} other questions tested in each fold, all "
        f"their answers. λ {one['or_weight']:g}. Rates, each the best of three tried on "
        f"{search['pairs']} pairs and {search['questions']} further questions: {rates}.",
    )


def of_truthful() -> str:
    one = kept("truthful")
    return truthful.tables(one).strip() if one else absent("truthful")


def said_truthful() -> str:
    """Say the main differences in words."""
    if not (one := kept("truthful")):
        return absent("truthful")
    lines = []
    for a, b in (("ORPO", "base"), ("ORPO", "SFT"), ("ORPO", "SFT then DPO"), ("SFT then ORPO", "ORPO")):
        both = truthful.differences(one, a, b) if {a, b} <= one["records"].keys() else {}
        if both and both["accuracy"]:
            parts = [f"{f} {verdict(both[f])}" for f in ("accuracy", "log_odds_ratio", "nll", "mc2")]
            lines.append(f"- **{a} minus {b}**, {len(both['accuracy'])} questions: {'; '.join(parts)}.")
    if more := counted(one):
        lines.append(more)
    if lacking := [name for name, folds in one["records"].items() if not folds]:
        lines.append(
            f"- Not measured yet, for want of time: {', '.join(lacking)}. The command goes on there."
        )
    return "\n".join(lines)


def counted(one: dict) -> str:
    """Say how many questions ORPO minus SFT would need in accuracy, where it is within the noise."""
    values = truthful.differences(one, "ORPO", "SFT")["accuracy"] if "SFT" in one["records"] else []
    if len(values) < 3 or "beyond" in verdict(values):
        return ""
    count = needed(values, 0.05)
    return (
        f"- To see a difference of 5 points in accuracy between ORPO and SFT in four of five trials, by the "
        f"variance measured here, {count:,} questions would have to be tested; these were {len(values)}."
    )


def rates() -> str:
    """Lay out what every run made tells of rate and λ."""
    one, rows = kept("truthful"), []
    head = ["pairs seen", "recipe", "rate of the last stage", "λ", "accuracy", "log-odds ratio", "nll"]
    if one:
        base, count = one["search_base"], one["search"]["pairs"]
        three = [f"{base[f]:.3f}" for f in ("accuracy", "log_odds_ratio", "nll")]
        rows.append(["0", "base", "–", "–", *three])
        for name, tries in one["search"]["tried"].items():
            for t in tries:
                three = [f"{t[f]:.3f}" for f in ("accuracy", "log_odds_ratio", "nll")]
                weight = f"{t['or_weight']:g}" if "ORPO" in name else "–"
                rows.append([f"{count}", name, f"{t['rate']:g}", weight, *three])
    return table(head, rows) if rows else absent("truthful")


def auto() -> str:
    """Say what `auto` takes of such a model, and what the runs found."""
    taken, _ = settle(Settings(), weights=135e6, method="lora", pairs=1000)
    said = f"`auto` takes a rate of {taken.learning_rate:g} and λ = {taken.or_weight:g} for adapters on 135 "
    said += "million weights. "
    if one := kept("truthful"):
        tries = [t for t in one["search"]["tried"].get("ORPO", [])]
        if tries:
            best = max(tries, key=lambda t: t["log_odds_ratio"])
            said += (
                f"Of the {len(tries)} ORPO runs of the search the largest log-odds ratio came from rate "
                f"{best['rate']:g} with λ = {best['or_weight']:g}, the rate chosen by accuracy was "
                f"{one['rates']['ORPO']:g}. One run each on {one['search']['questions']} questions, "
                f"without an "
                "interval: a hint, too little to change `auto` by. "
            )
    return said.strip()


def about_nocue() -> str:
    if not (one := kept("nocue")):
        return absent("nocue")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in one["rates"].items())
    return made(
        "nocue",
        f"{len(one['records'])} seeds, {one['pairs']} pairs to train on, once, {one['pairs_per_step']} a "
        f"step, {one['held_out']} held out for each; rates {rates}, not searched; λ {one['or_weight']:g}, "
        f"DPO's β {one['dpo_beta']:g}. All three start from the base model.",
    )


def of_nocue() -> str:
    one = kept("nocue")
    return nocue.tables(one).strip() if one else absent("nocue")


def said_nocue() -> str:
    if not (one := kept("nocue")):
        return absent("nocue")
    lines = []
    for a, b in (("ORPO", "base"), ("ORPO", "SFT"), ("DPO", "base")):
        values = [
            x - y
            for x, y in zip(nocue.by_twin(one, a, "accuracy"), nocue.by_twin(one, b, "accuracy"), strict=True)
        ]
        told = verdict(values)
        if "within" in told:
            told += f"; a gain of 5 points would need about {2 * needed(values, 0.05, 0.5):,} held-out pairs"
        lines.append(f"- **{a} minus {b}**, accuracy: {told}.")
    return "\n".join(lines)


def curves(one: dict) -> dict[str, list[list[float]]]:
    """Give [step, logp_chosen, logp_rejected] of each recipe, the mean over the seeds."""
    found = {}
    for recipe in nocue.RATES:
        runs = [history[recipe] for history in one["history"].values() if recipe in history]
        found[recipe] = [
            [mean(run[k][n] for run in runs) for n in range(3)] for k in range(min(map(len, runs)))
        ]
    return found


def displacement() -> str:
    if not (one := kept("nocue")):
        return absent("nocue")
    lines = [f"![The log-probability of chosen answers while SFT, DPO and ORPO train]({PICTURE})", ""]
    for recipe, rows in curves(one).items():
        (_, c0, r0), (step, c1, r1) = rows[0], rows[-1]
        way = "falls" if c1 < c0 else "rises"
        lines.append(
            f"- **{recipe}**, {step:.0f} steps: the chosen answers' log-probability {way} from {c0:.3f} to "
            f"{c1:.3f} nats per token, the rejected ones' goes from {r0:.3f} to {r1:.3f}."
        )
    return "\n".join(lines)


def about_own() -> str:
    if not (one := kept("own_samples")):
        return absent("own_samples")
    tokens = {name: mean(t[name] for t in one["tokens"]) for name in ("chosen", "written", "own samples")}
    pairs = mean(t["pairs"] for t in one["tokens"])
    return made(
        "own_samples",
        f"{len(one['tokens'])} of {one['folds']} folds, {pairs:.0f} questions to train on, once, "
        f"{one['questions']} tested in each; rate {one['learning_rate']:g}, not searched, λ "
        f"{one['or_weight']:g}. The "
        f"chosen answers have {tokens['chosen']:.0f} tokens, the written rejected ones "
        f"{tokens['written']:.0f}, the model's own {tokens['own samples']:.0f} "
        f"(of at most {one['answer_tokens']}; longer ones are left out).",
    )


def of_own() -> str:
    one = kept("own_samples")
    return own_samples.tables(one).strip() if one else absent("own_samples")


def said_own() -> str:
    if not (one := kept("own_samples")):
        return absent("own_samples")
    lines = []
    for a, b in (("own samples", "base"), ("own samples", "written")):
        rows, parts = list(zip(*(one["records"][name] for name in (a, b)), strict=True)), []
        for f in ("accuracy", "log_odds_ratio", "nll"):
            at = one["columns"].index(f)
            parts.append(f"{f} {verdict([x[at] - y[at] for x, y in rows])}")
        lines.append(f"- **{a} minus {b}**: {'; '.join(parts)}.")
    return "\n".join(lines)


def readme() -> str:
    """Say it in a few lines, for who reads no more."""
    one, parts = kept("truthful"), []
    for name, words in (("base", "the base model's"), ("SFT", "SFT's"), ("SFT then DPO", "SFT then DPO's")):
        if values := truthful.differences(one, "ORPO", name)["accuracy"] if one else []:
            parts.append(f"minus {words} is {verdict(values)}")
    if parts:
        said = (
            "On TruthfulQA's answers, which people wrote, and on questions not trained on, ORPO's accuracy "
        )
        said += "; ".join(parts) + ". "
    else:
        said = "Not proven here on answers that people wrote. "
    share = lab.said_of_words(one["bag_of_words"]["same"]) if one else ""
    bag = f"A bag of words that never sees the question ranks {share} right. "
    where = "What others found since, and what is not known: [docs/is_it_better.md](docs/is_it_better.md)."
    return f"**Is it better?** {said}{bag if one else ''}{where}"


BLOCKS = {
    "about-truthful": about_truthful, "truthful": of_truthful, "said-truthful": said_truthful,
    "rates": rates, "auto": auto, "about-nocue": about_nocue, "nocue": of_nocue, "said-nocue": said_nocue,
    "displacement": displacement, "about-own": about_own, "own": of_own, "said-own": said_own,
    "better": readme,
}  # fmt: skip


def filled(text: str) -> str:
    """Give a page with what BLOCKS gives between its marks."""

    def one(found) -> str:
        return f"<!-- {found[1]} -->\n{BLOCKS[found[1]]()}\n<!-- /{found[1]} -->"

    return re.sub(rf"<!-- ({'|'.join(BLOCKS)}) -->\n(.*?)<!-- /\1 -->", one, text, flags=re.S)


def draw(one: dict, file: Path) -> None:
    """Draw the log-probability of chosen answers while DPO, ORPO and SFT train."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for recipe, rows in curves(one).items():
        steps, chosen, rejected = zip(*rows, strict=True)
        left.plot(steps, chosen, label=recipe)
        right.plot(steps, [c - r for c, r in zip(chosen, rejected, strict=True)], label=recipe)
    left.set(title="chosen answers", xlabel="step", ylabel="log-probability, nats per token")
    right.set(title="chosen minus rejected", xlabel="step", ylabel="nats per token")
    left.legend(frameon=False)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(folders: list[str]) -> None:
    for folder in folders:
        for name in MODULES:
            if (file := Path(folder) / f"{name}.json").is_file():
                json.loads(file.read_text())
                shutil.copyfile(file, DOCS / file.name)
    if one := kept("nocue"):
        draw(one, DOCS / PICTURE)
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
