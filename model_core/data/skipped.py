"""What did not make it into a data set, counted by reason: nothing is dropped in silence."""

from __future__ import annotations

from dataclasses import dataclass, field

NUM_EXAMPLES = 5


@dataclass
class Skipped:
    """Counts by reason; the first names of each are kept."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """One more."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(named := self.examples.setdefault(reason, [])) < NUM_EXAMPLES:
            named.append(name)

    def warnings(self) -> list[str]:
        """A sentence for each reason."""
        return [f"{count} skipped: {reason} (such as {', '.join(self.examples[reason])})" for reason, count in sorted(self.counts.items())]
