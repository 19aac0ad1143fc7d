"""What keeps a fault from spreading: locks that outlive no call, files that are replaced whole, bytes read with care."""
