/*
CUDA's built-in vector types. Their alignment is the device's: a misaligned float4 is an error
there, and UndefinedBehaviorSanitizer reports it here.
*/
#pragma once

#define CPU_VECTOR2(name, type, bytes) \
    struct alignas(bytes) name { type x, y; }; \
    static inline name make_##name(type x, type y) { return name{x, y}; }
#define CPU_VECTOR3(name, type) \
    struct name { type x, y, z; }; \
    static inline name make_##name(type x, type y, type z) { return name{x, y, z}; }
#define CPU_VECTOR4(name, type, bytes) \
    struct alignas(bytes) name { type x, y, z, w; }; \
    static inline name make_##name(type x, type y, type z, type w) { return name{x, y, z, w}; }

CPU_VECTOR2(char2, signed char, 2)
CPU_VECTOR4(char4, signed char, 4)
CPU_VECTOR2(uchar2, unsigned char, 2)
CPU_VECTOR3(uchar3, unsigned char)
CPU_VECTOR4(uchar4, unsigned char, 4)
CPU_VECTOR2(short2, short, 4)
CPU_VECTOR4(short4, short, 8)
CPU_VECTOR2(ushort2, unsigned short, 4)
CPU_VECTOR4(ushort4, unsigned short, 8)
CPU_VECTOR2(int2, int, 8)
CPU_VECTOR3(int3, int)
CPU_VECTOR4(int4, int, 16)
CPU_VECTOR2(uint2, unsigned, 8)
CPU_VECTOR3(uint3, unsigned)
CPU_VECTOR4(uint4, unsigned, 16)
CPU_VECTOR2(longlong2, long long, 16)
CPU_VECTOR2(ulonglong2, unsigned long long, 16)
CPU_VECTOR2(float2, float, 8)
CPU_VECTOR3(float3, float)
CPU_VECTOR4(float4, float, 16)
CPU_VECTOR2(double2, double, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return uint3{x, y, z}; }
};
