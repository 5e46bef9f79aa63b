"""A virtual filesystem over any fsspec store, served over FTP and FTPS by pyftpdlib."""

from ftpvfs.authorizer import VFSAuthorizer, VFSHomes
from ftpvfs.config import ConfigError
from ftpvfs.filesystem import VFSFilesystem
from ftpvfs.fsspec_filesystem import FTPVFSFileSystem
from ftpvfs.server.handler import TLS_VFSHandler, VFSHandler
from ftpvfs.server.server import VFSServer
from ftpvfs.server.transfer import TLS_VFSDTPHandler, VFSDTPHandler
from ftpvfs.vfs.vfs import VFS

__version__ = "0.1.0"
__all__ = [
    "VFS",
    "ConfigError",
    "FTPVFSFileSystem",
    "TLS_VFSDTPHandler",
    "TLS_VFSHandler",
    "VFSAuthorizer",
    "VFSDTPHandler",
    "VFSFilesystem",
    "VFSHandler",
    "VFSHomes",
    "VFSServer",
    "__version__",
]
