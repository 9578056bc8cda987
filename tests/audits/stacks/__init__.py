"""Plain training scripts on stacks that have an adapter too, where the honest scripts do not show what it found."""
