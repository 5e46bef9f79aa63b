"""Users with homes inside a VFS, where nothing is looked up on this machine's disk."""

from __future__ import annotations

import pytest
from pyftpdlib.authorizers import AuthenticationFailed

from ftpvfs import VFSAuthorizer


@pytest.fixture
def authorizer() -> VFSAuthorizer:
    authorizer = VFSAuthorizer()
    authorizer.add_user("alice", "wonder", "/alice", perm="elradfmwMT")
    return authorizer


def test_homes_need_not_exist_and_are_normalized(authorizer: VFSAuthorizer) -> None:
    authorizer.add_user("bob", "builder", "no//such/../folder/")
    authorizer.add_anonymous()
    assert authorizer.get_home_dir("bob") == "/no/folder"
    assert authorizer.get_home_dir("anonymous") == "/"


def test_readers_are_the_default(authorizer: VFSAuthorizer) -> None:
    authorizer.add_user("bob", "builder")
    assert authorizer.get_perms("bob") == "elr"
    assert authorizer.has_perm("bob", "r", "/a")
    assert not authorizer.has_perm("bob", "w", "/a")


def test_users_and_letters_are_checked(authorizer: VFSAuthorizer) -> None:
    with pytest.raises(ValueError, match="already exists"):
        authorizer.add_user("alice", "x")
    with pytest.raises(ValueError, match="no such permission 'x'"):
        authorizer.add_user("bob", "x", perm="elx")
    with pytest.raises(ValueError, match="no such permission 'x'"):
        authorizer.override_perm("alice", "/alice/in", "x")


def test_passwords_are_compared(authorizer: VFSAuthorizer) -> None:
    authorizer.add_user("bob", "b\xfclder \N{SNOWMAN}")
    authorizer.add_anonymous()
    authorizer.validate_authentication("alice", "wonder", None)
    authorizer.validate_authentication("bob", "b\xfclder \N{SNOWMAN}", None)
    authorizer.validate_authentication("anonymous", "anything", None)
    for user, password in (("alice", "Wonder"), ("alice", ""), ("nobody", ""), ("nobody", "x"), ("bob", "\udcff")):
        with pytest.raises(AuthenticationFailed):
            authorizer.validate_authentication(user, password, None)


def test_rights_of_the_nearest_folder_hold(authorizer: VFSAuthorizer) -> None:
    authorizer.override_perm("alice", "/alice/in", "elr", recursive=True)
    authorizer.override_perm("alice", "/alice/in/out", "elrw")
    assert authorizer.has_perm("alice", "w", "/alice/a")
    assert not authorizer.has_perm("alice", "w", "/alice/in/a")
    assert not authorizer.has_perm("alice", "w", "/alice/in/deep/a")
    assert authorizer.has_perm("alice", "w", "/alice/in/out/a")
    assert not authorizer.has_perm("alice", "w", "/alice/in/out/deep/a")  # it is not recursive
    assert authorizer.has_perm("alice", "w", "/alice/inside")
    with pytest.raises(ValueError, match="escapes"):
        authorizer.override_perm("alice", "/alicebob", "elr")
    with pytest.raises(ValueError, match="home"):
        authorizer.override_perm("alice", "/alice", "elr")
