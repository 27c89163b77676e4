"""Triton's interpreter, made faster where it repeats itself."""

from __future__ import annotations

from typing import Any


class _Done:
    """In place of what would take a patch back."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """Let a launch patch `triton.language` once for each module of functions, not at every call of one.

    A launch puts the interpreter's functions in the place of triton's, then every call of a device function goes
    through all names of the language again and finds nothing left to do, which takes half of the time.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_module(function: Any) -> Any:
        if function.__module__ in patched:
            return _Done()
        patched.add(function.__module__)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        patched.clear()  # the last launch has taken its patch back
        launch(self, *args, **options)

    interpreter._patch_lang = patch_module
    interpreter.GridExecutor.__call__ = launch_anew
