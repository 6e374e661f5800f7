"""systemd for `dropforge service install`: unit files, and where they go on this machine."""
