"""The frozen model: loading it, rendering prompts for it, scoring candidates and sampling answers."""
