"""The FTP side: control connections, data connections, and how they run."""
