// Codes of a tile as bytes; part of quant-inl.h.

constexpr int kMaxColumns = 16;  // of a tile in blocks of four

// Columns 4i..4i+3 of 16 rows, one code a byte.  With constant arguments neighbouring blocks share their
// loads.
FLASHMOE_INLINE U8x64 column_codes(const uint8_t* p, int bits, int group, int i) {
  if (bits == 8) return u8_load(p + 64 * i);
  if (bits == 4 || bits == 6) {
    const U8x64 v = u8_load(p + 64 * (i / 2));
    const U8x64 nibble = u8_and(i % 2 == 0 ? v : u8_shr(v, 4), 0x0f);
    if (bits == 4) return nibble;
    const U8x64 top = u8_and(u8_shr(u8_load(p + 8 * group + 64 * (i / 4)), 2 * (i % 4)), 0x03);
    return u8_or(nibble, u8_shl(top, 4));
  }
  const U8x64 low = u8_and(u8_shr(u8_load(p + 64 * (i / 4)), 2 * (i % 4)), 0x03);
  if (bits == 2) return low;
  const U8x64 high = u8_load(p + 4 * group + 64 * (i / 8));
  return u8_or(low, u8_shl(u8_and(u8_shr(high, i % 8), 0x01), 2));
}

struct TileShape {
  int bits;
  int group;
  int64_t payload;  // bytes of codes
  bool f16;         // scales and biases; bf16 otherwise
  // What codes stand for, 16 entries four times over; null: for themselves.  A constant null costs nothing.
  const uint8_t* table;
};

// As column_codes, through the table if there is one.
FLASHMOE_INLINE U8x64 column_values(const uint8_t* p, const TileShape& shape, int i) {
  const U8x64 codes = column_codes(p, shape.bits, shape.group, i);
  return shape.table == nullptr ? codes : u8_lookup(u8_load(shape.table), codes);
}

FLASHMOE_INLINE void unpack(const uint8_t* p, const TileShape& shape, U8x64* columns) {
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < shape.group / 4; ++i) columns[i] = column_values(p, shape, i);
}

constexpr int kTableNbytes = 64;

FLASHMOE_INLINE void repeat_table(const TileMatrix& w, uint8_t* table) {
  for (int i = 0; i < kTableNbytes; ++i) table[i] = w.table[i % 16];
}

// The shape of a matrix's tiles; table: kTableNbytes of room for it.
FLASHMOE_INLINE TileShape tile_shape(const TileMatrix& w, uint8_t* table) {
  if (w.has_table) repeat_table(w, table);
  return {w.bits, w.group, kTileRows * w.group * w.bits / 8, w.f16_scales, w.has_table ? table : nullptr};
}
