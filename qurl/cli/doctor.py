"""`qurl doctor`: print the findings."""

from __future__ import annotations

import argparse

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""
    parser.epilog = "Exit code: 0 where everything needed is there, 2 where something failed."


def main(args: argparse.Namespace) -> int:
    """Returns 0, or 2 where a finding keeps runs from working."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from qurl.doctor import Level, diagnose

    findings = diagnose()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for finding in findings:
        level = finding.level.value
        text = escape(finding.found) + (f"  [bold]->[/bold] {escape(finding.fix)}" if finding.fix else "")
        table.add_row(f"[{STYLES[level]}]{level}[/]", finding.subject, text)
    Console().print(table)
    return 2 if any(finding.level is Level.fail for finding in findings) else 0
