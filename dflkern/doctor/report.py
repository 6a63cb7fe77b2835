"""The report: findings and levels, as values for JSON and as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .findings import Finding, Level, Severity
from .words import number, percent

WIDTH = 100
LABEL = 9


@dataclass(frozen=True)
class Report:
    """The findings, gravest first and each cause before its consequences; iterable, with a length.

    `print(report)` shows it all; `levels` has the targets of each stride.
    """

    findings: tuple[Finding, ...]
    levels: tuple[Level, ...] = ()
    num_bins: int | None = None
    examined: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def severity(self) -> Severity:
        """The gravest finding's; NOTE if there is none."""
        return max((finding.severity for finding in self.findings), default=Severity.NOTE)

    @property
    def healthy(self) -> bool:
        """Nothing above a note."""
        return self.severity is Severity.NOTE

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        findings = [asdict(finding) | {"severity": str(finding.severity)} for finding in self]
        return {
            "severity": str(self.severity),
            "healthy": self.healthy,
            "num_bins": self.num_bins,
            "examined": list(self.examined),
            "findings": findings,
            "levels": [asdict(level) for level in self.levels],
        }

    def __str__(self) -> str:
        return _render(self)


def _render(report: Report) -> str:
    """Verdict, findings, and the table of the levels."""
    blocks = [
        "\n".join(textwrap.wrap(_verdict(report), WIDTH)),
        *(_finding(finding) for finding in report),
    ]
    if report.levels:
        blocks.append(_levels(report))
    return "\n\n".join(blocks)


def _verdict(report: Report) -> str:
    counts = [(s, sum(f.severity is s for f in report)) for s in reversed(Severity)]
    words = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts if count)
    looked = f"Looked at {', '.join(report.examined)}."
    if not report.findings:
        return f"Nothing found. {looked}"
    if report.healthy:
        return f"Healthy: {words}, nothing to repair. {looked}"
    return f"{words}. Start with {report.findings[0].code}. {looked}"


def _finding(finding: Finding) -> str:
    if finding.because:
        head = f"  {finding.severity}: {finding.code}, because of {finding.because}"
        return "\n".join([head, *_lines("", finding.title, indent=4)])
    return "\n".join(
        [
            f"{finding.severity}: {finding.code}",
            *_lines("", finding.title),
            *_lines("example", finding.example),
            *_lines("cause", finding.cause),
            f"  {'fix':{LABEL}}{finding.fix}",  # code is not wrapped
        ]
    )


def _lines(label: str, text: str, indent: int = 2) -> Iterator[str]:
    first = " " * indent + (f"{label:{LABEL}}" if label else "")
    rest = " " * len(first)
    yield from textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


def _levels(report: Report) -> str:
    columns: tuple[str, ...] = (
        "stride", "sides", "below", "above", "at the bound", "largest", "reach", "K for 99.5 %",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            "all" if level.stride is None else number(level.stride),
            str(level.count),
            percent(level.below),
            percent(level.above),
            percent(level.at_bound),
            "" if level.largest is None else number(level.largest),
            f"{number(level.reach)} {'cells' if level.stride is None else 'px'}",
            "" if level.wanted_bins is None else str(level.wanted_bins),
        )
        for level in report.levels
    ]
    if not any(level.wanted_bins for level in report.levels):
        columns, rows = columns[:-1], [line[:-1] for line in rows]
    return f"Targets as DFL takes them, K = {report.num_bins}:\n{_table(columns, rows)}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    return "\n".join(
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in (columns, *rows)
    )
