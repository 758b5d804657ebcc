"""`iddpm diagnose`: what stands in a run's way, with the numbers that say so."""

from iddpm.cli.flags import Parser, Verb
from iddpm.saying import say
from iddpm.store.remote import place
from iddpm.words import many


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, finished or not")


def _diagnose(run: str) -> None:
    from iddpm.look.diagnosis import diagnose
    from iddpm.look.parts import look_at
    from iddpm.look.runs import read_run

    found = read_run(place(run))
    for note in found.notes:
        print(f"warning: {note}")
    said = diagnose(found, look_at(found)[0])
    what = many(len(said.findings), "finding") if said.findings else "nothing stands out"
    say(f"{run}: {what}, at step {found.step:,}", "diagnosed", run=run, step=found.step, findings=len(said.findings))
    for k, (rule, finding) in enumerate(said.findings.items(), 1):
        text = f"\n{k}. {finding.says}\n   {finding.evidence}\n   change: {finding.change}"
        say(text, "finding", rule=rule, **finding._asdict())
    say(f"\nlooked at, and well: {', '.join(said.fine) or 'nothing'}", "fine", rules=said.fine)
    for name, why in said.unknown.items():
        say(f"cannot tell: {name} ({why})", "unknown", rule=name, why=why)


VERB = Verb(_diagnose, _parser, "RUN", "what stands in a run's way, the numbers that say so, and the flag to change")
