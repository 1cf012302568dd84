# The extension that build.py makes; its own declarations are the C headers.
from typing import Any

ffi: Any
lib: Any
