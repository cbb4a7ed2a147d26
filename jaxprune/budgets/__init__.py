"""What a budget means: knapsacks over modules, latency measured on this device, and the record of a choice."""
