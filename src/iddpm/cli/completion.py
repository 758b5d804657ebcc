"""`iddpm completion`: what a shell needs to complete verbs, flags and their choices, from the tables that the help is made of."""

from collections.abc import Callable, Mapping

from iddpm.cli.flags import Parser, Verb

Words = Mapping[str, Mapping[str, list[str]]]  # of each verb its flags, with their choices


def bash(words: Words) -> str:
    cases = []
    for verb, flags in words.items():
        values = [f"      --{flag}) words='{' '.join(chosen)}' ;;\n" for flag, chosen in flags.items() if chosen]
        others = f"      *) words='{' '.join(f'--{flag}' for flag in flags)}' ;;\n"
        cases.append(f"    {verb})\n      case $before in\n{''.join(values)}{others}      esac ;;\n")
    return f"""# eval "$(iddpm completion bash)"
_iddpm() {{
  local now=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=''
  if [ "$COMP_CWORD" = 1 ]; then words='{" ".join(words)}'; else case ${{COMP_WORDS[1]}} in
{"".join(cases)}  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$now"))
}}
complete -o default -F _iddpm iddpm
"""


def zsh(words: Words) -> str:
    return f'# eval "$(iddpm completion zsh)"\nautoload -Uz compinit bashcompinit && compinit && bashcompinit\n{bash(words)}'


def fish(words: Words) -> str:
    lines = ["# iddpm completion fish | source", f"complete -c iddpm -n __fish_use_subcommand -a '{' '.join(words)}'"]
    for verb, flags in words.items():
        for flag, chosen in flags.items():
            values = f" -x -a '{' '.join(chosen)}'" if chosen else ""
            lines.append(f"complete -c iddpm -n '__fish_seen_subcommand_from {verb}' -l {flag}{values}")
    return "\n".join(lines)


SHELLS: dict[str, Callable[[Words], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def verb(parsers: Callable[[], Mapping[str, Parser]]) -> Verb:
    """The verb itself, from the parsers of all."""

    def parser(parser: Parser) -> None:
        parser.add_argument("shell", choices=tuple(SHELLS))
        parser.epilog = 'bash, zsh: eval "$(iddpm completion SHELL)" in the start file; fish: iddpm completion fish | source'

    def run(shell: str) -> None:
        print(SHELLS[shell]({name: parser.words() for name, parser in parsers().items()}))

    return Verb(run, parser, "SHELL", "what bash, zsh or fish need to complete verbs, flags and choices")
