"""Results for people: tables, pictures, videos, and one HTML page with all of them."""
