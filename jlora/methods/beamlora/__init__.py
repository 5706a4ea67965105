"""BeamLoRA, and its rule."""

from jlora.methods.beamlora.method import BeamLoRA as BeamLoRA
