"""The method: read this first; it trains alone and knows no wing."""
