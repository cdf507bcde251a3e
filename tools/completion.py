"""Print a file that makes a shell complete the options of all scripts, and their values, at the Tab key.

python tools/completion.py bash > ~/.lora_suite.bash               and in ~/.bashrc: source ~/.lora_suite.bash
python tools/completion.py zsh > ~/.lora_suite.zsh                 and in ~/.zshrc: source ~/.lora_suite.zsh
python tools/completion.py powershell > $HOME/lora_suite.ps1       and in $PROFILE: . $HOME/lora_suite.ps1

It holds for `python train_network.py`, `accelerate launch train_network.py` and `./train_network.py`, in any folder.
Run it again after an update of the suite: the options are in what it prints.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import PRINT, PRINT_HELP, parse, spellings
from library.config.kinds import read_path_text
from library.config.options import REQUIRED, Option, option, root_options
from library.logs import run_script

# Script -> the module and the class of its options; those with the same class are completed alike.
SCRIPTS = {
    "train_network.py": "library.config.train.TrainConfig",
    "sdxl_train_network.py": "library.config.train.TrainConfig",
    "tools/cache_latents.py": "library.config.train.TrainConfig",
    "gen_img_diffusers.py": "library.config.generation.GenerateConfig",
    "gen_img.py": "library.config.generation.GenerateConfig",
    "sdxl_gen_img.py": "library.config.generation.GenerateConfig",
    "networks/check_lora_weights.py": "networks.check_lora_weights.CheckOptions",
    "networks/convert_lora.py": "networks.convert_lora.ConvertConfig",
    "networks/extract_lora_from_dylora.py": "networks.extract_lora_from_dylora.SplitOptions",
    "networks/extract_lora_from_models.py": "networks.extract_lora_from_models.ExtractConfig",
    "networks/merge_lora.py": "networks.merge_lora.MergeConfig",
    "networks/sdxl_merge_lora.py": "networks.merge_lora.MergeConfig",
    "networks/resize_lora.py": "networks.resize_lora.ResizeConfig",
    "networks/svd_merge_lora.py": "networks.svd_merge_lora.SvdMergeConfig",
    "tools/canny.py": "tools.canny.CannyOptions",
    "tools/completion.py": "tools.completion.CompletionOptions",
    "tools/convert_diffusers20_original_sd.py": "tools.convert_diffusers20_original_sd.ConvertConfig",
    "tools/dylora_report.py": "tools.dylora_report.ReportConfig",
    "tools/report.py": "tools.report.PageOptions",
    "tools/merge_models.py": "tools.merge_models.MergeConfig",
    "tools/resize_images_to_resolution.py": "tools.resize_images_to_resolution.ResizeConfig",
    "tools/show_metadata.py": "tools.show_metadata.ShowOptions",
    "finetune/clean_captions_and_tags.py": "finetune.clean_captions_and_tags.CleanOptions",
    "finetune/merge_captions_to_metadata.py": "finetune.merge_texts.MergeConfig",
    "finetune/merge_dd_tags_to_metadata.py": "finetune.merge_texts.MergeConfig",
}
STARTERS = ("python", "python3", "accelerate", "py")  # commands that start scripts


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Shell."""

    shell: Literal["bash", "zsh", "powershell"] = option(REQUIRED, "shell to print the file for", positional=True)


class Name(NamedTuple):
    """A name of an option: what follows it, and its line in the help.

    follows is "switch" (nothing), "words", "files" (or folders), "folders" or "text".
    """

    name: str
    follows: str
    words: tuple[str, ...]
    many: bool  # whether several values follow
    help: str


class Group(NamedTuple):
    """Scripts that have the same options."""

    scripts: tuple[str, ...]  # names of files
    names: tuple[Name, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    options = parse(CompletionOptions, argv, description=__doc__)
    sys.stdout.write(SHELLS[options.shell](groups()))
    return 0


def groups() -> list[Group]:
    """Return all scripts with the names of their options, as they are declared."""
    scripts: dict[str, list[str]] = {}
    for path, place in SCRIPTS.items():
        scripts.setdefault(place, []).append(Path(path).name)
    found = []
    for place, paths in scripts.items():
        module, _, name = place.rpartition(".")
        options = root_options(getattr(importlib.import_module(module), name)).values()
        names = [name for entry in options if not entry.spec.positional for name in names_of(entry)]
        asked = [Name("--help", "switch", (), False, "show all options and end")]
        asked += [Name(f"--{PRINT}", "switch", (), False, PRINT_HELP)]
        found.append(Group(tuple(paths), (*names, *asked)))
    return found


def names_of(entry: Option) -> list[Name]:
    """Return the names of an option."""
    is_path = entry.kind.name.removeprefix("list of ") == "path" or entry.spec.parse is read_path_text
    if entry.kind.nargs == 0:
        follows = "switch"
    elif entry.choices:
        follows = "words"
    elif is_path:
        # Of folders the names say so, of those to be written as well.
        is_folder = entry.spec.reads == "a folder" or entry.flag.endswith(("dir", "folder"))
        follows = "folders" if is_folder else "files"
    else:
        follows = "text"
    many = entry.kind.nargs == "*"
    return [Name(name, follows, entry.choices, many, entry.spec.help) for name in spellings(entry)]


def told(name: Name) -> str:
    """Return in words of a shell what follows a name: how many values, of what kind, and the words."""
    return " ".join(("many" if name.many else "one", name.follows, *name.words))


def cases(rows: Iterable[tuple[Sequence[str], str]], indent: str) -> str:
    """Return the rows of a `case` of bash or zsh: patterns, and what is done."""
    return "\n".join(f"{indent}{'|'.join(map(quote, names))}) {action} ;;" for names, action in rows)


def by_answer(group: Group) -> list[tuple[list[str], str]]:
    """Return the names of a group by what follows them."""
    found: dict[str, list[str]] = {}
    for name in group.names:
        found.setdefault(told(name), []).append(name.name)
    return [(names, f"reply={quote(answer)}") for answer, names in found.items()]


def finders(found: Sequence[Group]) -> str:
    """Return the functions that bash and zsh share: the group of a script, and what follows an option."""
    numbered = list(enumerate(found))
    scripts = cases(((group.scripts, f"reply={number}") for number, group in numbered), "    ")
    follows = "\n".join(
        f"    {n})\n      case $2 in\n{cases(by_answer(g), '        ')}\n      esac ;;" for n, g in numbered
    )
    return (
        "_lora_suite_group() {  # file name of a script -> its group\n  reply=\n  case $1 in\n"
        f"{scripts}\n  esac\n}}\n\n"
        "_lora_suite_follows() {  # group, option -> how many values follow, of what kind, words\n  reply=\n"
        f"  case $1 in\n{follows}\n  esac\n}}\n"
    )


def commands(found: Sequence[Group]) -> str:
    """Return the commands for which a shell asks."""
    return " ".join((*STARTERS, *(script for group in found for script in group.scripts)))


def bash(found: Sequence[Group]) -> str:
    """Return the file for bash."""
    names = cases(
        (([str(n)], f"reply={quote(' '.join(name.name for name in g.names))}") for n, g in enumerate(found)), "    "
    )
    return BASH.format(
        finders=finders(found),
        names=f"_lora_suite_names() {{  # group -> names of its options\n  case $1 in\n{names}\n  esac\n}}\n",
        commands=commands(found),
    )


def zsh(found: Sequence[Group]) -> str:
    """Return the file for zsh, which shows the help of each option beside it."""
    rows = []
    for number, group in enumerate(found):
        described = (quote(f"{name.name}:{name.help.replace(':', chr(92) + ':')}") for name in group.names)
        rows.append(([str(number)], f"reply=({' '.join(described)})"))
    return ZSH.format(
        finders=finders(found),
        names=f"_lora_suite_names() {{  # group -> names and help\n  case $1 in\n{cases(rows, '    ')}\n  esac\n}}\n",
        commands=commands(found),
    )


def in_powershell(text: str) -> str:
    """Return a text in single quotes for PowerShell, for which curly quotes are quotes as well."""
    return "'" + "".join(letter * 2 if letter in "'\u2018\u2019\u201a\u201b" else letter for letter in text) + "'"


def powershell(found: Sequence[Group]) -> str:
    """Return the file for PowerShell, which shows the help of each option, too."""
    scripts = "\n".join(
        f"    {in_powershell(script)} = {number}" for number, group in enumerate(found) for script in group.scripts
    )
    rows = []
    for group in found:
        names = (
            f"        {in_powershell(name.name)} = @({in_powershell(told(name))}, {in_powershell(name.help)})"
            for name in group.names
        )
        rows.append("    [ordered]@{\n" + "\n".join(names) + "\n    }")
    asked = ", ".join(map(in_powershell, commands(found).split()))
    return POWERSHELL.format(scripts=scripts, options=",\n".join(rows), commands=asked)


BASH = """\
# Completion of a LoRA training suite, printed by tools/completion.py.
{finders}
{names}
_lora_suite() {{
  local reply= group= option= index first current between=0
  current=${{COMP_WORDS[COMP_CWORD]}}
  for ((index = 0; index < COMP_CWORD; index++)); do
    reply=${{COMP_WORDS[index]//\\\\//}}
    _lora_suite_group "${{reply##*/}}"
    if [[ -n $reply ]]; then group=$reply first=$index; break; fi
  done
  COMPREPLY=()
  if [[ -z $group ]]; then  # another script: what was there before
    if [[ -n ${{_lora_suite_before[$1]:-}} ]]; then "${{_lora_suite_before[$1]}}" "$@"; fi
    return
  fi
  [[ $current == = ]] && current=
  for ((index = COMP_CWORD - 1; index > first; index--)); do  # the option that the word is for
    case ${{COMP_WORDS[index]}} in
      =) ;;
      -*) option=${{COMP_WORDS[index]}}; break ;;
      *) between=$((between + 1)) ;;
    esac
  done
  if [[ $current == -* ]]; then
    _lora_suite_names "$group"
    COMPREPLY=($(compgen -W "$reply" -- "$current"))
    compopt +o default +o bashdefault 2>/dev/null
    return
  fi
  _lora_suite_follows "$group" "$option"
  local count kind words
  read -r count kind words <<< "$reply"
  [[ $count == one && $between -gt 0 ]] && kind=
  case $kind in
    words) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
    text) compopt +o default +o bashdefault 2>/dev/null ;;
    folders) compopt +o default +o bashdefault -o dirnames 2>/dev/null ;;
  esac  # else names of files and folders, which bash completes itself
}}
declare -A _lora_suite_before
for _lora_suite_command in {commands}; do
  if [[ $(complete -p "$_lora_suite_command" 2>/dev/null) =~ -F\\ ([^ ]+) ]]; then
    [[ ${{BASH_REMATCH[1]}} == _lora_suite ]] || _lora_suite_before[$_lora_suite_command]=${{BASH_REMATCH[1]}}
  fi
  complete -o bashdefault -o default -F _lora_suite "$_lora_suite_command"
done
unset _lora_suite_command
"""

ZSH = """\
# Completion of a LoRA training suite, printed by tools/completion.py.
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}

{finders}
{names}
_lora_suite() {{
  local reply group option index first between=0 count kind
  for ((index = 1; index < CURRENT; index++)); do
    _lora_suite_group "${{words[index]:t}}"
    if [[ -n $reply ]]; then group=$reply first=$index; break; fi
  done
  if [[ -z $group ]]; then  # another script: what was there before
    ${{_lora_suite_before[$service]:-_default}} "$@"
    return
  fi
  for ((index = CURRENT - 1; index > first; index--)); do  # the option that the word is for
    if [[ ${{words[index]}} == -* ]]; then
      option=${{words[index]}}
      break
    fi
    between=$((between + 1))
  done
  if [[ $PREFIX == -*=* ]]; then
    option=${{PREFIX%%=*}} between=0
    compset -P '*='
  elif [[ $PREFIX == -* ]]; then
    local -a reply
    _lora_suite_names "$group"
    _describe -o option reply
    return
  fi
  _lora_suite_follows "$group" "$option"
  local -a parts=(${{(z)reply}})
  count=${{parts[1]}} kind=${{parts[2]}}
  [[ $count == one && $between -gt 0 ]] && kind=
  case $kind in
    words) compadd -- "${{(@)parts[3,-1]}}" ;;
    text) _message 'a value' ;;
    folders) _files -/ ;;
    *) _files ;;
  esac
}}
typeset -gA _lora_suite_before
() {{
  local name
  for name in {commands}; do
    [[ -n ${{_comps[$name]}} && ${{_comps[$name]}} != _lora_suite ]] && _lora_suite_before[$name]=${{_comps[$name]}}
    compdef _lora_suite $name
  done
}}
"""

POWERSHELL = """\
# Completion of a LoRA training suite, printed by tools/completion.py.
$LoraSuiteScripts = @{{
{scripts}
}}
$LoraSuiteOptions = @(
{options}
)
Register-ArgumentCompleter -Native -CommandName @({commands}) -ScriptBlock {{
    param($wordToComplete, $commandAst, $cursorPosition)
    $words = @($commandAst.CommandElements |
        Where-Object {{ $_.Extent.StartOffset -lt $cursorPosition }} | ForEach-Object {{ $_.ToString() }})
    if ($wordToComplete -ne '' -and $words.Count -gt 0) {{ $words = @($words | Select-Object -SkipLast 1) }}
    $options = $null; $option = $null; $between = 0
    foreach ($word in $words) {{
        $name = ($word.Trim('"', "'") -split '[\\\\/]')[-1]
        if ($null -eq $options) {{
            if ($LoraSuiteScripts.ContainsKey($name)) {{ $options = $LoraSuiteOptions[$LoraSuiteScripts[$name]] }}
        }} elseif ($word.StartsWith('-')) {{
            $option = $word; $between = 0
        }} else {{
            $between += 1
        }}
    }}
    if ($null -eq $options) {{ return }}
    $start = ''; $typed = $wordToComplete
    if ($typed -match '^(-[^=]*)=(.*)$') {{
        $option = $Matches[1]; $between = 0; $start = "$option="; $typed = $Matches[2]
    }} elseif ($typed.StartsWith('-')) {{
        $options.Keys | Where-Object {{ $_.StartsWith($typed) }} | ForEach-Object {{
            [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterName', $options[$_][1])
        }}
        return
    }}
    if ($null -eq $option -or -not $options.Contains($option)) {{ return }}
    $count, $kind, $known = $options[$option][0] -split ' '
    if ($kind -ne 'words' -or ($count -eq 'one' -and $between -gt 0)) {{ return }}  # PowerShell completes files itself
    $known | Where-Object {{ $_.StartsWith($typed) }} | ForEach-Object {{
        [System.Management.Automation.CompletionResult]::new("$start$_", $_, 'ParameterValue', $_)
    }}
}}
"""

SHELLS: dict[str, Callable[[Sequence[Group]], str]] = {"bash": bash, "zsh": zsh, "powershell": powershell}


if __name__ == "__main__":
    run_script(main)
