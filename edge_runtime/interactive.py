"""`comigs predict` without text: suggestions change as one types."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from edge_runtime.errors import ComigsError
from edge_runtime.predict import Predictor, Suggestion


def converse(predictor: Predictor, *, top: int, refresh: Callable[[], None]) -> None:
    """Runs until Ctrl-D or Ctrl-C. Tab takes the first suggestion, Enter starts a new line.

    Args:
        refresh: called before each prediction; may switch the predictor to fresher adapters.

    Raises:
        ComigsError: as `refresh` and the predictor do.
    """
    keys = KeyBindings()
    shown: list[Suggestion] = []

    @keys.add("tab")
    def take(event: KeyPressEvent) -> None:
        if shown:
            event.current_buffer.insert_text(shown[0].text)

    @keys.add("c-d")
    def end(event: KeyPressEvent) -> None:
        # By default it ends an empty line only.
        event.app.exit(exception=EOFError)

    def toolbar() -> FormattedText:
        # A typed byte that is no UTF-8 stands there as half a surrogate pair.
        text = get_app().current_buffer.text.encode(errors="ignore").decode()
        try:
            refresh()
            shown[:] = predictor.suggest(text, top)
        except ComigsError as error:
            # Raised here, it would end nothing.
            get_app().exit(exception=error)
            return FormattedText()
        parts: list[tuple[str, str]] = []
        for suggestion in shown:
            parts.append(("bold", f" {suggestion.text!r}"))
            parts.append(("", f" {suggestion.probability:.0%} "))
        return FormattedText([*parts, ("italic", "  Tab takes the first, Ctrl-D ends")])

    session: PromptSession[str] = PromptSession(key_bindings=keys, bottom_toolbar=toolbar)
    while True:
        try:
            session.prompt("> ")
        except (EOFError, KeyboardInterrupt):
            return
