"""The app's server: Gradio's, with nothing that leads outside."""

from pathlib import Path

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..serving.addresses import LOOPBACK, is_loopback
from .uploads import MAX_BYTES


# The browser itself refuses whatever is not from here: scripts, fonts, images, connections.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's configuration, and its templates of `gr.HTML`
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)


class ContentPolicy:
    """ASGI middleware: every answer tells the browser to load nothing from elsewhere."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = CONTENT_POLICY
                headers["referrer-policy"] = "no-referrer"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, with_policy)


def theme() -> gr.themes.Base:
    """Gradio's, in the fonts that a machine has, and with small print that can be read."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="indigo", **fonts).set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color_dark="*neutral_400",
    )


def serve(page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> str:
    """
    Start the server of a page, and return its address. Without `port` it takes the first free one from 7860 on.
    """
    middleware = [Middleware(ContentPolicy)]
    if is_loopback(host) and not share:
        # A page elsewhere whose name leads to this machine (DNS rebinding) is not answered.
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, host]))
    page.queue(max_size=64, api_open=False, default_concurrency_limit=1)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        inline=False,
        prevent_thread_lock=True,
        show_error=True,
        max_file_size=MAX_BYTES,
        theme=theme(),
        css_paths=Path(__file__).with_name("style.css"),
        app_kwargs={"middleware": middleware},
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        _frontend=False,  # no check that it answers within three seconds, which a machine that samples may not
    )
    return address


def warnings_about(host: str, share: bool) -> list[str]:
    """What to say where others than this machine reach the app, which has no password."""
    warnings = []
    if not is_loopback(host):
        warnings.append(
            f"--host {host} lets in everyone who reaches this machine, without a password. From elsewhere, "
            "`ssh -L 7860:127.0.0.1:7860` reaches the default, 127.0.0.1"
        )
    if share:
        warnings.append("--share gives the app a public address, through gradio.app, without a password")
    return warnings
