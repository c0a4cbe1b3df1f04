"""Low-rank adapters of a model's linears, through PEFT: trained, saved alone, combined, merged."""
