"""`pi-rl convert` as the tests call it."""

import json

from pi_rl.cli.main import main


def convert(capsys, *words):
    """Runs the command and reads its JSON."""
    code = main(["convert", *map(str, words), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def refused(capsys, *words):
    """Runs the command and reads the message that it ends with."""
    assert main(["convert", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    return told.err
