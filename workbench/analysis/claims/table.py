"""The table of claims: as Markdown for a file, and as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.analysis.claims import regime
from workbench.analysis.claims.verdicts import ABSENT, FAILS, HOLDS, OPEN
from workbench.analysis.intervals import ENOUGH
from workbench.common.markdown import markdown_table
from workbench.data.rows import read_prompts
from workbench.studies import tuning
from workbench.studies.experiment import Experiment

RULES = (
    "Each effect is signed so that the paper says greater than 0, one value a training seed, arms paired by seed. It "
    "holds where the whole 95 % t interval of its mean lies above 0, and a claim where all its effects do. A claim "
    "does not hold where the interval of one of its k effects lies below 0 even at 1 - 0.05 / k. All else is "
    "inconclusive, also with {few}runs that were lost. Beside an inconclusive effect stands about the smallest one "
    "that as many seeds of this spread would have told from 0 in 8 of 10 such studies. Intervals are over training "
    "seeds alone: pairs, prompts, image seeds, probe and pretrained model are the same in each."
)
#: What stands in a verdict's place where a study has too few seeds for any: by the signs of the deciding effects.
LEANINGS = WITH, AGAINST, MIXED = (
    "leans with (no verdict)",
    "leans against (no verdict)",
    "mixed (no verdict)",
)
NO_VERDICTS = (
    f"No verdicts: fewer than {ENOUGH} seeds cannot tell an effect from chance. A claim leans with the paper where all "
    "effects that would decide it are above 0, against it where all are below, and is mixed otherwise; other seeds may "
    "turn any of these around."
)
REGIME = (
    "The paper's regime, as numbers of the runs of Fig. 1b, means over seeds. Outside of it a verdict says how these "
    "settings behave, not whether the paper is right."
)
TUNING = (
    "Every arm had the same number of steps and pairs. One small search, the same for all, tried these multiples of an "
    "arm's own settings ({factors}; {design}) on prompts and a seed that the comparison does not use; the best by "
    "{objective}, over {images} images of one training seed, is below. An arm whose best value lay on the edge of what "
    "it had tried went on one step beyond, at most {extensions} times, and the edges named are those that were left. "
    "{likes}"
)
LIKES = "Arms that take another method apart take what that method found, as the paper's ablations do: {}."
DESIGNS = {"grid": "all combinations", "star": "one setting at a time"}


def number(value: float) -> str:
    """A value to three significant digits, signed."""
    return f"{value:+.3g}" if value else "0"


def markdown(
    rows: Sequence[Mapping[str, Any]],
    measures: Sequence[regime.Measure],
    findings: tuning.Findings | None,
    experiment: Experiment,
) -> str:
    """The claims as Markdown: regime, how many hold, the table, the rules, and what each arm was given.

    Args:
        rows: from `verdicts.judge`, each with a `link`.
        measures: from `regime.measure`.
        findings: of the search that tuned the arms; None where they were not.
        experiment: with the arms, and with how they were tuned.
    """
    seeds, verdicts = len(experiment.sweep.seeds) or 1, [verdict_text(row) for row in rows]
    counts = " · ".join(
        f"{v}: **{verdicts.count(v)}**" for v in (HOLDS, *LEANINGS, OPEN, FAILS, ABSENT) if v in verdicts
    )
    warning, leans = regime.sentence(measures), bool({*LEANINGS} & {*verdicts})
    head = ("#", "claim", "paper", "effect (95 % interval over seeds): what was measured", "verdict", "runs")
    body = [
        (
            row["number"],
            row["title"],
            row["where"],
            "<br>".join(filter(None, [*(_effect(effect, seeds) for effect in row["effects"]), row["reason"]])),
            verdict if verdict in LEANINGS else f"**{verdict}**",
            f"[MLflow]({row['link']})",
        )
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    parts = [
        "# The paper's claims on this model",
        *([f"**{warning}**"] if warning else []),
        f"{len(rows)} claims, {seeds} seeds, {experiment.config.train.steps} steps a run. {counts}",
        markdown_table(head, body),
        *([NO_VERDICTS] if leans else []),
        # Where seeds are too few for any verdict, an effect is not called inconclusive for that.
        RULES.format(few="" if leans else f"fewer than {ENOUGH} seeds or with "),
        *([REGIME, regime.markdown(measures)] if measures else []),
        *(_tuning(findings, experiment) if findings else []),
    ]
    return "\n\n".join(parts) + "\n"


def _tuning(findings: tuning.Findings, experiment: Experiment) -> list[str]:
    """How the arms were tuned and what came of it; a value on the edge of what was tried is marked."""
    sweep, search = experiment.declared_sweep, tuning.search(experiment, findings.tried).config
    factors = "; ".join(f"{k}: {', '.join(f'{f:g}' for f in v)}" for k, v in sweep.tuning.factors.items())
    likes = ", ".join(f"{arm} like {declared['like']}" for arm, declared in sweep.arms.items() if "like" in declared)
    images = search.evaluation.seeds * len(read_prompts(search.data.prompts))
    edges = findings.on_edge
    rows = [
        (
            arm,
            ", ".join(f"{k} = {v:g}" for k, v in values.items()),
            findings.count(arm),
            ", ".join(edges[arm]) or "none",
        )
        for arm, values in findings.best.items()
    ]
    text = TUNING.format(
        factors=factors,
        design=DESIGNS[sweep.tuning.design],
        objective=sweep.objective,
        images=images,
        extensions=sweep.tuning.extensions,
        likes=LIKES.format(likes) if likes else "",
    )
    return [text, markdown_table(("arm", "best values", "runs", "on the edge of what was tried"), rows)]


def verdict_text(row: Mapping[str, Any]) -> str:
    """What the table says of a claim: its verdict, or where its seeds are too few for one, which way its effects lean.

    Args:
        row: of `verdicts.judge`.
    """
    effects = [effect for effect in row["effects"] if effect["decides"]]
    # A reason says why there is no verdict, such as runs that were lost: those that are left would lean the better way.
    if row["verdict"] != OPEN or row["reason"] or not effects or max(e["seeds"] for e in effects) >= ENOUGH:
        return str(row["verdict"])
    if all(effect["mean"] > 0 for effect in effects):
        return WITH
    return AGAINST if all(effect["mean"] < 0 for effect in effects) else MIXED


def _effect(effect: Mapping[str, Any], seeds: int) -> str:
    return f"**{number(effect['mean'])}** ({interval(effect)}): {effect['statement']}{_remarks(effect, seeds)}"


def interval(effect: Mapping[str, Any]) -> str:
    """An effect's interval; in its place how many seeds there are, where they are too few for one."""
    if effect["seeds"] < ENOUGH:
        return f"{effect['seeds']} seed{'s' if effect['seeds'] > 1 else ''}: no interval"
    return f"{number(effect['low'])} to {number(effect['high'])}"


def _remarks(effect: Mapping[str, Any], seeds: int) -> str:
    """What must be known of an effect besides its numbers.

    Args:
        seeds: that the study has; 0 = not said.
    """
    shown = "" if effect["decides"] else " (shown only)"
    fewer = "" if effect["seeds"] == seeds or not seeds else f" ({effect['seeds']} of {seeds} seeds ended)"
    return f"{shown}{fewer}{_sight(effect)}"


def _sight(effect: Mapping[str, Any]) -> str:
    """Beside an inconclusive effect, the smallest one that its seeds could have seen."""
    inconclusive = effect["verdict"] == OPEN and effect["detectable"]
    return f" (about the smallest effect that could be seen: {number(effect['detectable'])})" if inconclusive else ""


def plain(rows: Sequence[Mapping[str, Any]], measures: Sequence[regime.Measure]) -> str:
    """The claims for a terminal: the regime where it is another, then a line a claim with its verdict and effects."""
    warning = regime.sentence(measures)
    lines = [f"\n{warning}"] if warning else []
    if {*LEANINGS} & {verdict_text(row) for row in rows}:
        lines.append(f"\n{NO_VERDICTS}")
    most = max((effect["seeds"] for row in rows for effect in row["effects"]), default=0)
    for row in rows:
        lines.append(f"\n{row['number']:2d}. {verdict_text(row).upper()}: {row['title']} ({row['where']})")
        lines += [
            f"      {number(e['mean']):>9s} ({interval(e)})  {e['statement']}{_remarks(e, most)}"
            for e in row["effects"]
        ]
        if row["reason"]:
            lines.append(f"      {row['reason']}")
    return "\n".join(lines)
