"""Has Transformers find dynaexq in programs that never import it: a server, an evaluation, the notebook of a stranger.

It is installed beside the package, and a .pth file has it run whenever Python starts. Nothing is imported then. The
package is imported when Transformers' tables of quantizers are, which `registration` fills.
"""

import sys


class _Finder:
    """Finds one module, once."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]  # `typing` takes its time to import
        if name != "transformers.quantizers.auto":
            return None
        import importlib.util
        from contextlib import suppress

        sys.meta_path.remove(_Finder)
        with suppress(ImportError):  # no program should fail for a dynaexq that it does not use
            import dynaexq  # noqa: F401  for what it registers
        return importlib.util.find_spec(name)


sys.meta_path.insert(0, _Finder)
