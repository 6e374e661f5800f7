"""Commands about notices: notify test."""

from __future__ import annotations

import importlib.util
import socket

import typer

from daemon.cli.app import MACHINE, JsonFlag, app, out, print_json
from daemon.errors import ConfigError
from daemon.notice_sender import MISSING, read_urls, send_now
from daemon.notices import Notice

notify_app = typer.Typer(help="Tell people what happened: [notify].", no_args_is_help=True)
app.add_typer(notify_app, name="notify", rich_help_panel=MACHINE)


@notify_app.command("test")
def try_addresses(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Send a notice to every address of [notify], and say which did not take it. Exit 1 when one did not.

    Example: dropforge notify test
    """
    settings = context.obj.settings
    urls = read_urls(settings)
    if not urls:
        raise ConfigError(
            operation="send a notice",
            cause="no address is set",
            hint="`dropforge config set notify.urls ntfy://ntfy.sh/TOPIC`, or write addresses into a file and set notify.urls_file",
        )
    if importlib.util.find_spec("apprise") is None:
        raise ConfigError(operation="send a notice", cause=MISSING)
    body = f"A test: {settings.root} on {socket.gethostname()} can reach you.\nIt tells of: {', '.join(settings.notify.events)}."
    sent = send_now(urls, Notice(title="Dropforge: a test", body=body))
    if as_json:
        print_json({"addresses": len(urls), "refused": list(sent.refused)})
    else:
        for line in sent.said:
            out.print(line, markup=False)
        for service in sent.refused:
            out.print(f"not taken by {service}", markup=False)
        if not sent.refused:
            out.print(f"taken by {len(urls)} of {len(urls)} addresses", markup=False)
    if sent.refused:
        raise typer.Exit(1)
