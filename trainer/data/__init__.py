"""From captioned pictures to batches: records, plan, transforms, loader."""
