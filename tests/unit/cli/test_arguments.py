# SPDX-License-Identifier: LGPL-2.1-or-later
"""Wrong usage: one line says what is wrong, with the likeliest remedy, and one names the help."""

import pytest

from libvirt_natns.cli import commands


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that says what is wrong."""
    with pytest.raises(SystemExit) as exit_:
        commands.main(arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    fault, more = said.err.splitlines()
    command = fault.partition(":")[0]
    assert more == f"see {command} --help"
    return fault


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "virt-natns: the following arguments are required: COMMAND"),
        (["no-such"], "virt-natns: there is no command no-such: expected install, uninstall, "),
        (["statsu"], "virt-natns: there is no command statsu: did you mean status?"),
        (["Status"], "virt-natns: there is no command Status: did you mean status?"),
        (["forward"], "virt-natns forward: the following arguments are required: list|add|remove"),
        (["forward", "lst"], "virt-natns forward: there is no command lst: did you mean list?"),
        (["router", "staus"], "virt-natns router: there is no command staus: did you mean status?"),
        (["plan"], "virt-natns plan: the following arguments are required: FILE|NETWORK"),
        (["status", "a", "b"], "virt-natns status: unexpected argument b"),
        (["status", "--jsn"], "virt-natns status: unknown option --jsn: did you mean --json?"),
        (["forward", "list", "--jsn", "web"],
         "virt-natns forward list: unknown option --jsn: did you mean --json?"),
        # The misspelt option makes its value look like a guest.
        (["forward", "add", "--netwrk", "a", "web", "2222:22"],
         "virt-natns forward add: unknown option --netwrk: did you mean --network?"),
        (["forward", "add", "--netwrk=a", "web", "2222:22"],
         "virt-natns forward add: unknown option --netwrk: did you mean --network?"),
        (["sync", "--no-such"], "virt-natns sync: unknown option --no-such"),
        (["install", "--scope", "isolatd"],
         "virt-natns install: argument --scope: is 'isolatd': did you mean isolated?"),
        (["install", "--scope", "both"],
         "virt-natns install: argument --scope: is 'both': expected isolated or annotated"),
        (["forward", "add", "web", "8080:http"],
         "virt-natns forward add: argument FORWARD: '8080:http' is not"
         " [ADDRESS:]PORT[-PORT][:PORT[-PORT]][/tcp|udp|sctp],"
         " for example 2222:22, 8000-8010 or auto:22/udp"),
        (["forward", "remove", "web", "http"],
         "virt-natns forward remove: argument FORWARD: 'http' is not"
         " [ADDRESS:]PORT[-PORT][:PORT[-PORT]][/tcp|udp|sctp],"
         " for example 2222, 8000-8010 or 53/udp"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    fault = refused(arguments, capsys)
    assert fault == said if not said.endswith(", ") else fault.startswith(said)


@pytest.mark.parametrize("example", ["2222:22", "8000-8010", "auto:22/udp"])
def test_examples_of_forwards_can_be_added(example: str) -> None:
    assert commands.make_parser().parse_args(["forward", "add", "web", example]).spec


@pytest.mark.parametrize("example", ["2222", "8000-8010", "53/udp"])
def test_examples_of_forwards_can_be_removed(example: str) -> None:
    assert commands.make_parser().parse_args(["forward", "remove", "web", example]).spec


def test_long_options_can_be_shortened() -> None:
    assert commands.make_parser().parse_args(["status", "--js"]).json


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["status", "-dash"], 'a name that begins with "-" goes after "--": -- -dash'),
        (["check", "-lab"], 'goes after "--": -- -lab'),
        (["plan", "-x"], 'goes after "--": -- -x'),
        (["exec", "-dash", "--", "ls", "-l"], 'goes after "--": -- -dash'),
        (["forward", "add", "-web", "2222:22"], 'goes after "--": -- -web'),
        (["forward", "add", "--network", "-dash", "web", "2222:22"],
         'a value that begins with "-" is written --network=-dash'),
        (["status", "--json", "-dash"], 'a name that begins with "-" goes after "--": -- -dash'),
        (["forward", "add", "--network=a", "-web", "2222:22"], 'goes after "--": -- -web'),
        (["status", "--json", "a", "b"], ""),
        (["forward", "add", "--network"], ""),
        (["exec"], ""),
    ],
)  # fmt: skip
def test_names_that_look_like_options(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(arguments, capsys)
    assert line.endswith(hint) if hint else "begins with" not in line
