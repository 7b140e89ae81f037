// Codes of a tile as bytes; part of quant-inl.h.

struct GroupCodes {
  U8x64 columns[16];  // columns 4i..4i+3 of 16 rows, one code a byte
};

FLASHMOE_INLINE void unpack_2bit(const uint8_t* p, int group, U8x64* columns) {
  for (int step = 0; step < group / 16; ++step) {
    const U8x64 v = u8_load(p + 64 * step);
    columns[4 * step] = u8_and(v, 0x03);
    columns[4 * step + 1] = u8_and(u8_shr(v, 2), 0x03);
    columns[4 * step + 2] = u8_and(u8_shr(v, 4), 0x03);
    columns[4 * step + 3] = u8_and(u8_shr(v, 6), 0x03);
  }
}

FLASHMOE_INLINE void unpack_3bit(const uint8_t* p, int group, U8x64* columns) {
  unpack_2bit(p, group, columns);
  const uint8_t* high = p + 4 * group;
  for (int step = 0; step < group / 32; ++step) {
    const U8x64 v = u8_load(high + 64 * step);
    for (int j = 0; j < 8; ++j) {
      const U8x64 bit = u8_and(u8_shr(v, j), 0x01);
      columns[8 * step + j] = u8_or(columns[8 * step + j], u8_shl(bit, 2));
    }
  }
}

FLASHMOE_INLINE void unpack(const uint8_t* p, int bits, int group, U8x64* columns) {
  if (bits == 4) {
    for (int step = 0; step < group / 8; ++step) {
      const U8x64 v = u8_load(p + 64 * step);
      columns[2 * step] = u8_and(v, 0x0f);
      columns[2 * step + 1] = u8_and(u8_shr(v, 4), 0x0f);
    }
  } else if (bits == 8) {
    for (int step = 0; step < group / 4; ++step) columns[step] = u8_load(p + 64 * step);
  } else if (bits == 2) {
    unpack_2bit(p, group, columns);
  } else {
    unpack_3bit(p, group, columns);
  }
}
