"""What people read: tables, notes, pictures and model cards, made of records of plain values."""
