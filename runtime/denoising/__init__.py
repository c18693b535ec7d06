"""The loop over the steps, on the processor or on a device."""
