"""Which version of a registered model is its champion: the candidate, once it is better on the same videos by a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vswin_dist import storage
from vswin_dist.errors import ConfigError, WorkFailed, after_start, before_start
from vswin_dist.evaluation.compare import Comparison, check_comparable
from vswin_dist.evaluation.history import LoggedEvaluation, evaluations
from vswin_dist.evaluation.launch import RETRY
from vswin_dist.evaluation.options import Asked
from vswin_dist.evaluation.predictions import Predictions
from vswin_dist.evaluation.subjects import find_subject
from vswin_dist.tracking import CANDIDATE, CHAMPION, ModelVersion, Registry, tracking_uri, wait_for_store


@dataclass(frozen=True)
class Decision:
    """Whether the alias moves, and why."""

    moves: bool
    why: str


@dataclass(frozen=True)
class Contest:
    """The two versions of a name, as its aliases mean them now."""

    candidate: ModelVersion
    champion: ModelVersion | None

    @property
    def settled(self) -> Decision | None:
        """What is decided without scores, if it is."""
        if self.champion is None:
            return Decision(True, f"{self.candidate.name} had no champion")
        if self.champion.version == self.candidate.version:
            return Decision(False, "it is the candidate, too")
        if not self.champion.is_trained:
            return Decision(True, "the weights before any training are replaced")
        return None

    def says(self, decision: Decision) -> str:
        """Put a decision into words."""
        if not decision.moves:
            assert self.champion
            return f"{self.champion.uri} stays the champion: {decision.why}"
        was = f", {self.champion.uri} was it before" if self.champion else ""
        return f"{self.candidate.uri} is the champion now{was}: {decision.why}"


@before_start()
def find_contest(name: str, asked: Asked) -> Contest:
    """Find candidate and champion of the registered model `name`.

    Raises:
        CheckpointError: there is no such name, or it has no candidate. ConfigError: there is no registry.
        PreflightError: the store is away, or this account may not move the alias.
    """
    registry = Registry(tracking_uri(asked.tracking_uri))
    candidate = registry.find(f"models:/{name}@{CANDIDATE}")
    registry.check_right(candidate)
    champion = registry.aliases(name).get(CHAMPION)
    return Contest(candidate, registry.find(f"models:/{name}/{champion}") if champion is not None else None)


def scored(contest: Contest, asked: Asked) -> tuple[Predictions, Predictions]:
    """Give what was found of every video with the champion, and with the candidate.

    Scored on `asked.data`, as far as they were not before; the views are those of the candidate's recipe where none are
    asked for. Without data it is what evaluations of the same dataset and views have logged.

    Raises:
        ConfigError: no data, and no such evaluations. DataError: other classes. CheckpointError: files are gone.
        WorkFailed: as `launch.score`.
    """
    champion, candidate = contest.champion, contest.candidate
    assert champion
    if asked.data is None:
        return _logged(champion, candidate, asked)
    second = find_subject(candidate.uri, asked)
    first = find_subject(champion.uri, replace(asked, clips=second.identity.clips, crops=second.identity.crops))
    check_comparable(first.identity, second.identity, any_data=False)
    return first.predictions(asked), second.predictions(asked)


def decide(comparison: Comparison, sides: Sequence[Predictions], margin: float, certain: bool = False) -> Decision:
    """Decide by the top-1 of A, the champion, and B, the candidate.

    Args:
        margin: points by which B must be above A, and more.
        certain: not only the difference but its whole 95% interval must be.
    """
    d, videos = comparison.differences[0], f"{comparison.videos:,} videos of {comparison.identities[0].dataset}"
    between = f"{d.difference.score:+.2f}, 95% interval {d.difference.low:+.2f} to {d.difference.high:+.2f}"
    scores = f"top-1 {d.b:.2f} against {d.a:.2f} ({between}) on {videos}, {comparison.identities[0].views}"
    if alone := sorted(set(sides[0].keys) ^ set(sides[1].keys)):
        more = (
            f"{len(alone)} videos were scored with one of them alone, first {alone[0]!r}: with --data they are tried again"
        )
        return Decision(False, f"{more}; {scores}")
    what = "the whole interval" if certain else "the difference"
    moves = (d.difference.low if certain else d.difference.score) > margin
    return Decision(moves, f"{scores}: {what} is {'' if moves else 'not '}above the margin of {margin:g} points")


def enact(contest: Contest, decision: Decision, asked: Asked, **tags: str) -> None:
    """Move the alias where the decision says so, and write on both versions what replaced what, when and why.

    Args:
        tags: further ones of both versions.

    Raises:
        WorkFailed: the aliases were moved meanwhile, or the store is away.
    """
    if not decision.moves:
        return
    candidate, champion = contest.candidate, contest.champion
    registry = Registry(tracking_uri(asked.tracking_uri))
    with after_start(RETRY):
        wait_for_store(registry.uri)
        now = registry.aliases(candidate.name)
        if (now.get(CANDIDATE), now.get(CHAMPION)) != (candidate.version, champion and champion.version):
            known = ", ".join(f"{alias} {version}" for alias, version in sorted(now.items()))
            raise WorkFailed(
                f"the aliases of {candidate.name} were moved meanwhile ({known}): nothing was changed. "
                "Give the same command again"
            )
        registry.crown(candidate, champion, decision.why, tags)


@before_start()
def _logged(champion: ModelVersion, candidate: ModelVersion, asked: Asked) -> tuple[Predictions, Predictions]:
    storage.use_s3_endpoint(asked.s3_endpoint)
    uri = tracking_uri(asked.tracking_uri)

    def usable(model: ModelVersion) -> list[LoggedEvaluation]:
        views = (asked.clips, asked.crops)
        fits = (e for e in evaluations(uri, model.uri) if all(v in (None, w) for v, w in zip(views, e.key[1:], strict=True)))
        return [e for e in fits if not e.shuffled]

    firsts, seconds = usable(champion), usable(candidate)
    for second in seconds:
        for first in firsts:
            if first.key == second.key and (b := second.read(uri)) and (a := first.read(uri)):
                check_comparable(a.identity, b.identity, any_data=False)
                return a, b
    known = "; ".join(
        f"{model.uri}: {', '.join(f'{e.dataset} {e.fingerprint[:8]} {e.clips} x {e.crops}' for e in found) or 'none'}"
        for model, found in ((champion, firsts), (candidate, seconds))
    )
    raise ConfigError(
        "there are no evaluations of champion and candidate on the same dataset with the same views whose predictions can "
        f"be read ({known}): name the shards to score both on in --data"
    )
