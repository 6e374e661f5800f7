"""From a dropped file to a queued job: watch, settle, claim, validate; and the archive of finished files."""
