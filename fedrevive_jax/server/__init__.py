"""The server core: hands out jobs, takes uploads in, keeps versions. No clock, no data."""
