"""viewers"""
