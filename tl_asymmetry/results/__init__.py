"""What all results share: tables on disk, the report, definitions, provenance, notes, the store of checkpoints."""
