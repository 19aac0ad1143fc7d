"""What keeps a fault from spreading: locks that outlive no call, files replaced whole, outside bytes checked."""
