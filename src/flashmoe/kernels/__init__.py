"""Operations of a decoder: their contract (ops), a slow reference (reference) and the native backend (cpu)."""
