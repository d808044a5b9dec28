"""Knowledge of public text that models with different tokenizers exchange (K-01, K-02, K-08)."""
