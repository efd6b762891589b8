"""What people would otherwise decode with, each in its best settings; see README.md."""
