"""The workbench's version; a module of its own, so that no package below has to import the whole."""

__version__ = "0.1.0"
