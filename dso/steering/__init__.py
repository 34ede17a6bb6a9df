"""Steerings: the operators, where they sit, how they are attached, and the checkpoint that ships them."""
