"""Files of tensors in every format that is read: mapped, checked, never run."""
