"""What a reader must know before the figures: mixed, disturbed, incomplete or partial results."""

from __future__ import annotations

from collections.abc import Sequence

from gptjet.benchmarks.records import Session
from gptjet.benchmarks.report.analysis import Analysis, Machine
from gptjet.benchmarks.report.words import plural
from gptjet.benchmarks.statistics import percentile


def warnings_of(analysis: Analysis) -> list[str]:
    """Sentences for the top of the report; empty where nothing is to be said."""
    found = []
    for machine in analysis.machines:
        sessions = analysis.sessions_of(machine)
        notes = {session.model_note for session in sessions if session.model_note}
        found += [f"{machine}: the model is {note}." for note in sorted(notes)]
        if any(session.quick for session in sessions):
            found.append(f"{machine}: made with --quick, a look and not a measurement.")
        if not all(session.hardware_verified for session in sessions):
            found.append(
                f"{machine}: the servers were reached over --endpoint; that their hardware is "
                f"{machine.hardware} is the caller's word."
            )
        found += _mixed(machine, sessions)
        found += _disturbed(analysis, machine)
        meant = {str(session.config["hardware"]["name"]) for session in sessions}
        for name in sorted(meant - {machine.hardware}):
            found.append(f"{machine}: run with the configuration of {name}, on other hardware.")
    results = analysis.results
    if results.failures:
        count = plural(len(results.failures), "run")
        found.append(f"{count} failed; what failed is listed under \u201cWhat was recorded\u201d.")
    if results.infeasible:
        count = plural(len(results.infeasible), "cell")
        found.append(f"{count} not feasible, listed under \u201cWhat was recorded\u201d.")
    if results.duplicates:
        count = plural(results.duplicates, "run")
        found.append(f"{count} recorded twice with different figures; the first was kept.")
    return found


def _mixed(machine: Machine, sessions: Sequence[Session]) -> list[str]:
    """Whether one label stands for several machines or sweeps: merged, they look like one."""
    devices = sorted({_device(session) for session in sessions})
    found = []
    if len(devices) > 1:
        found.append(
            f"{machine}: these runs were made on different machines ({'; '.join(devices)}), and a "
            f"reduction may be between two of them: make a report of each."
        )
    names = {name for session in sessions for name in session.identity}
    changed = [n for n in sorted(names) if len({str(s.identity.get(n)) for s in sessions}) > 1]
    if changed:
        found.append(
            f"{machine}: the files are of different sweeps (another {', '.join(changed)}): make a "
            f"report of each."
        )
    return found


def _device(session: Session) -> str:
    """The card, or the processor and how many cores of it."""
    cards = session.environment.get("gpus") or []
    cpu = session.environment.get("cpu") or {}
    if cards and session.hardware != "cpu":
        return str(cards[0].get("name"))
    return f"{cpu.get('model')}, {plural(cpu.get('usable_cores') or 0, 'core')}"


def _disturbed(analysis: Analysis, machine: Machine) -> list[str]:
    """Whether other work ran beside the sweep: a server alone loads no more than its cores."""
    loads = [s.load for c in analysis.cells if c.machine == machine for s in c.samples]
    cpus = [session.environment.get("cpu") or {} for session in analysis.sessions_of(machine)]
    cores = max((cpu.get("usable_cores") or 0 for cpu in cpus), default=0)
    load = percentile(loads, 50)
    if not cores or load <= 1 + 1.5 * cores:
        return []
    return [
        f"{machine}: other work ran on this machine (median load {load:.1f} on {cores} cores): "
        f"these latencies are not those of a quiet one."
    ]
