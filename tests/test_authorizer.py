"""Users with homes inside a VFS, where nothing is looked up on this machine's disk."""

from __future__ import annotations

import os
import pwd
from typing import Any

import pyftpdlib.authorizers
import pytest
from pyftpdlib.authorizers import AuthenticationFailed, DummyAuthorizer

from ftpvfs import VFSAuthorizer, VFSHomes


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


# --- pyftpdlib's own


class Dummies(VFSHomes, DummyAuthorizer):
    pass


def unix_users(**keywords: Any) -> Any:
    """pyftpdlib's authorizer of system users, with homes in a VFS; the test is skipped where there is none."""
    base = getattr(pyftpdlib.authorizers, "UnixAuthorizer", None)
    if base is None:
        pytest.skip("Python 3.13 and later have no shadow passwords")
    if os.geteuid():
        pytest.skip("only the superuser may ask for shadow passwords")
    attributes = {"home_root": keywords.pop("home_root", "/")}
    return type("Users", (VFSHomes, base), attributes)(require_valid_shell=False, **keywords)


def test_any_authorizer_of_pyftpdlibs_takes_homes_in_a_vfs() -> None:
    with pytest.raises(ValueError, match="no such directory"):
        DummyAuthorizer().add_user("alice", "wonder", "/nowhere/alice")
    authorizer = Dummies()
    authorizer.add_user("alice", "wonder", "/nowhere//alice/", "elradfmwMT", msg_login="Hello.")
    authorizer.add_user("bob", "builder")
    authorizer.add_anonymous("/public", msg_quit="Bye.")
    homes = {user: authorizer.get_home_dir(user) for user in ("alice", "bob", "anonymous")}
    assert homes == {"alice": "/nowhere/alice", "bob": "/", "anonymous": "/public"}
    assert (authorizer.get_perms("alice"), authorizer.get_perms("bob")) == ("elradfmwMT", "elr")
    assert (authorizer.get_msg_login("alice"), authorizer.get_msg_quit("anonymous")) == ("Hello.", "Bye.")
    authorizer.validate_authentication("alice", "wonder", None)
    with pytest.raises(AuthenticationFailed):
        authorizer.validate_authentication("alice", "Wonder", None)
    with pytest.raises(ValueError, match="already exists"):
        authorizer.add_user("alice", "x", "/")
    with pytest.raises(ValueError, match="no such permission"):
        authorizer.add_user("carol", "x", "/", perm="x")


def test_rights_of_folders_in_a_vfs_are_given_with_any_authorizer() -> None:
    authorizer = Dummies()
    authorizer.add_user("alice", "wonder", "/nowhere/alice", "elradfmwMT")
    authorizer.override_perm("alice", "/nowhere/alice/in", "elr", recursive=True)
    authorizer.override_perm("alice", "/nowhere/alice/out", "e")
    below = ("a", "in/a/b", "out/a", "out/a/b")
    found = {path: authorizer.has_perm("alice", "w", f"/nowhere/alice/{path}") for path in below}
    assert found == {"a": True, "in/a/b": False, "out/a": False, "out/a/b": True}


def test_the_vfs_may_stand_for_a_folder_above_the_homes() -> None:
    class Users(Dummies):
        home_root = "/home"

    authorizer = Users()
    for user, home in (("alice", "/home/alice"), ("all", "/home"), ("other", "/homeless"), ("root", "/root")):
        authorizer.add_user(user, "x", home)
    homes = {user: authorizer.get_home_dir(user) for user in authorizer.user_table}
    assert homes == {"alice": "/alice", "all": "/", "other": "/homeless", "root": "/root"}


def test_system_users_have_homes_in_a_vfs() -> None:
    authorizer = unix_users()
    assert authorizer.get_home_dir("daemon") == os.path.normpath(pwd.getpwnam("daemon").pw_dir)
    authorizer.override_user("daemon", password="x", homedir="/nowhere/daemon", perm="elr")
    assert (authorizer.get_home_dir("daemon"), authorizer.get_perms("daemon")) == ("/nowhere/daemon", "elr")
    authorizer.override_user("daemon", password="x", perm="elr")
    assert authorizer.get_home_dir("daemon") == os.path.normpath(pwd.getpwnam("daemon").pw_dir)
    authorizer.override_user("bin", msg_login="Hello.")
    assert authorizer.get_home_dir("bin") == os.path.normpath(pwd.getpwnam("bin").pw_dir)
    authorizer.validate_authentication("daemon", "x", None)
    above = os.path.dirname(os.path.normpath(pwd.getpwnam("daemon").pw_dir))
    assert unix_users(home_root=above).get_home_dir("daemon").count("/") == 1


def test_the_anonymous_users_system_user_needs_no_folder_of_this_machine() -> None:
    authorizer = unix_users(anonymous_user="nobody")
    assert authorizer.get_home_dir("anonymous") == os.path.normpath(pwd.getpwnam("nobody").pw_dir)
    authorizer.validate_authentication("anonymous", "", None)


def test_the_process_stays_who_it_is() -> None:
    authorizer = unix_users()
    authorizer.impersonate_user("daemon", "")
    assert os.geteuid() == 0
    authorizer.terminate_impersonation("daemon")
