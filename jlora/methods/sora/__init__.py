"""SoRA, and its rule."""

from jlora.methods.sora.method import SoRA as SoRA
