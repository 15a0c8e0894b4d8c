"""Shows the default and the `help` of a config field on the API pages."""

import ast
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Reads `field(default=..., metadata={"help": ...})` without importing the module."""

    def __init__(self) -> None:
        self.named: list[tuple[griffe.Attribute, str]] = []

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "field"):
            return
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        if "default" in arguments:
            attr.value = ast.unparse(arguments["default"])
        metadata = arguments.get("metadata")
        entries = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
        for key, text in entries:
            if isinstance(key, ast.Constant) and key.value == "help":
                if isinstance(text, ast.Name):
                    self.named.append((attr, text.id))
                elif isinstance(text, ast.Constant):
                    attr.docstring = griffe.Docstring(text.value, parent=attr)

    def on_package(self, **_: Any) -> None:
        """Looks up texts that several fields share, once all modules are read."""
        for attr, name in self.named:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(attr.module[name].value)), parent=attr)
        self.named.clear()
