"""What models look like on disk: safetensors, packed zeros, gates of many tasks, and writes that leave nothing half."""
