"""Provenance: plain values that name code, versions and machine, and nobody."""

import getpass
import json
import socket
from datetime import datetime
from pathlib import Path

import torch

from ratlip import errors, provenance
from ratlip.errors import RatlipError


def test_it_says_what_a_result_was_made_with():
    facts = provenance.describe()
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(facts["versions"].values()), "a package of the list is not installed, or is called otherwise"
    assert datetime.fromisoformat(facts["time"]).tzinfo is not None
    assert facts["cores"] >= 1 and facts["threads"] >= 1 and facts["processor"]
    assert json.loads(json.dumps(facts)) == facts


def test_it_names_no_path_no_host_and_no_user():
    text = json.dumps(provenance.describe())
    assert str(Path.cwd()) not in text and str(Path.home()) not in text
    for name in (socket.gethostname(), getpass.getuser()):
        assert f'"{name}"' not in text


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    facts = provenance.describe()
    assert facts["commit"] is None and facts["uncommitted_changes"] is None


def test_every_error_of_the_user_is_a_ratlip_error():
    own = [thing for thing in vars(errors).values() if isinstance(thing, type) and thing is not errors.Stopped]
    assert len(own) >= 5 and all(issubclass(thing, RatlipError) and thing.__doc__ for thing in own)
