"""`iddpm report`: a run, or several beside each other, as a page of HTML."""

from iddpm.cli.flags import Parser, Verb, file_to_write
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place
from iddpm.words import size


def _parser(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", metavar="run", help="a run's folder; several are compared")
    parser.add_argument("--out", default="", metavar="FILE", help="the page [RUN/report.html; of several runs ./report.html]")
    parser.add_argument("--csv", default="", metavar="FILE", help="the table of several runs [beside the page]")


def _report(runs: list[str], out: str, csv: str) -> None:
    if not runs:
        raise UserError("which run? iddpm report RUN, or several to compare them")
    from iddpm.look import report

    paths = [place(run) for run in runs]
    if missing := [path for path in paths if not path.exists()]:  # before a folder is made for the page
        raise UserError(f"{missing[0]} does not exist: give the folder of a run")
    if alone := [path for path in paths if path.is_file()]:
        raise UserError(f"{alone[0]} is a file: give the folder of a run, which has the log and the samples beside the weights")
    target = file_to_write(out or (paths[0] / report.NAME if len(paths) == 1 else report.NAME), "--out", ".html")
    table = file_to_write(csv, "--csv", ".csv") if csv else target.with_suffix(".csv") if len(paths) > 1 else None
    for fault in report.write(paths, target, table):
        print(f"warning: {fault}")
    text = f"report: {target} ({size(len(target.read_bytes()))})" + (f"; table: {table}" if table else "")
    say(text, "wrote", path=target, table=table)


VERB = Verb(_report, _parser, "RUN [RUN ...]", "a page of HTML on a run, or on several beside each other")
